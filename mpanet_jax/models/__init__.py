"""The network: ResNet, the attention modules and MPANet itself. Of this package it imports only the errors."""
