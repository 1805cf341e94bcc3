"""The commands of `stellarbyte`, one in each module. Only the module of the command that runs is imported.

Each has `run(options)`, which executes the options from arguments and returns the exit status, and `FAILURES`: the
errors with one sentence for the user as str().
"""
