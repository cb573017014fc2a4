"""The stages of the study, one file each, readable alone from top to bottom.

Importing a stage file must stay cheap: torch, transformers, trl and peft are imported inside the stage body only,
and Prefect never. That is what lets a fully cached run finish in about a second.
"""
