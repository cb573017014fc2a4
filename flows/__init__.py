"""The study as a graph of stages, its plan, its execution with or without Prefect, and the command line.

Nothing here imports torch, transformers or trl, and only `prefect_engine` imports Prefect: planning a fully cached
study takes a second because of that.
"""
