"""Helpers. `constants`, `exceptions` and `version_control` keep import paths that other software relies on."""
