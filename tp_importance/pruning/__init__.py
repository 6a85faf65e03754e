"""From an importance and a budget to a smaller network: plan, surgery, report."""
