"""The stages: each checks its input, works layer by layer or shard by shard, and fills one folder."""
