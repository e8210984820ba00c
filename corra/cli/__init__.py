"""The command line: flags, words, and what each verb is given."""
