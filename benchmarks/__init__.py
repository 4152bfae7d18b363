"""How fast it is: real processes, real stores, figures beside a no-op on the same server in the same run."""
