"""The OAuth surface: the same verbs as the JSON API, in the words unmodified clients and verifiers know."""
