"""The stages: each checks its input, works layer by layer or shard by shard, and fills one folder.

A stage returns the writer of its folder, which is finished unless other processes or runs have parts of it to make.
"""
