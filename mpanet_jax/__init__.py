"""MPANet (CVPR 2021), visible-infrared person re-identification, in JAX and Flax."""
