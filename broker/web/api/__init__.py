"""The JSON API under `/v1`: one module per noun, shapes in `shapes`."""
