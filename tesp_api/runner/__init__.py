"""The runner: the program on the node that carries out one plan.

It is shipped as a zipapp, needs Python 3.6 and the standard library only, and imports nothing outside this package.
"""
