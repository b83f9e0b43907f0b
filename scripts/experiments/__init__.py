"""What docs/results/ was measured by."""
