"""The verbs. They own every transaction, and call providers only between them."""
