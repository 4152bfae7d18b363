"""The main job, played on one machine: `python -m demo`."""
