"""The networks: ResNet, the attention modules, MPANet and AGW."""
