"""The network: ResNet, the attention modules and MPANet itself. Imports nothing else of this package."""
