"""Row-block reductions: pure functions on tensors, plain torch."""
