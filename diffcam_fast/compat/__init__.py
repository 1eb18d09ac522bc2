"""Other libraries' names on our engine: change one import, or none.

``from diffcam_fast.compat.pytorch_grad_cam import GradCAM`` is the one; `install` lets code that imports the library
itself run as it is. See ``docs/migration.md`` for what differs.
"""

from diffcam_fast.compat.aliases import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
