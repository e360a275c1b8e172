"""Features of clips: presets, extraction, the feature store and its packed views."""
