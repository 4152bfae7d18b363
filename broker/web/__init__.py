"""HTTP in, HTTP out. Knows no SQL, calls no provider, decides nothing."""
