"""Tasks in: rows become ``Task`` objects, are checked, and are dealt out by ordinal so that a resume needs one number."""
