"""The scans that make state-space models fast: one public function per recurrence."""
