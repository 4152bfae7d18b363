"""Whether somebody else's verifier keeps the rules: a broker that can be made to misbehave, and what it asks then."""
