"""What the stages are made of: importable, no argparse, no printing."""
