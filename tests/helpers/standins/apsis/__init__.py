"""A stand-in for Apsis 2.4: the interface of its program types, as its documentation has it.

Apsis can't be installed from an index: the name belongs to another project there.
"""
