"""Fine-tuning: update rules, the loop, checkpoints and what is kept of a trial."""
