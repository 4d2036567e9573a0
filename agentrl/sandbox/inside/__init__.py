"""The fork server and the jail. Standard library and ctypes only: it starts in milliseconds and every import here is in
the address space of the code that is being run.
"""
