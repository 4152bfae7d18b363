"""Our memory: the only room that speaks SQL. It decides nothing."""
