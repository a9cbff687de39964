"""What everything stands on: files written whole, progress, this machine, and the code's own fingerprint."""
