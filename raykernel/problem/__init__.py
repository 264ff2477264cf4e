"""The function f: task, prompt, model and readout at theta_0."""
