"""Noise, the rules of acceptance and stopping, and the one denoising loop."""
