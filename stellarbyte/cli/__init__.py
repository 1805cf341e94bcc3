"""What each command of `stellarbyte` does. Only the module of the one that runs is imported.

Each has `run(options)`, which does what arguments.py parsed and returns the exit status, and `FAILURES`: the errors
whose str() is one sentence for the user.
"""
