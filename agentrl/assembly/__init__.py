"""The composition root: config in, wired processes out. Only this package and the command line see every stage."""
