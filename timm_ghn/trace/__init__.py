"""Recording a model's forward pass on the meta device."""
