"""The words and the rules: pure values and functions.

Never reads a clock, the environment, the network or the database: time is an argument here.
"""
