"""The merge server: a spool of plain files, a daemon that runs one worker process per job, metrics.

Nothing here imports torch, except what a worker process runs.
"""
