"""The main job with secrets that another system makes, on a real OpenBao and PostgreSQL: `python -m demo.vault`."""
