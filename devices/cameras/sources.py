"""From the name of a source, as settings and options give it, to an open camera."""

from __future__ import annotations

from pathlib import Path

import cv2

from ...core.errors import CameraError
from .camera import FPS, Camera
from .csi_camera import CsiCamera
from .file_camera import ImageFileCamera, VideoFileCamera
from .shared_frame import SharedFrameCamera
from .usb_camera import UsbCamera


def open_camera(name: str, source: str | int) -> Camera:
    """An open camera for `source`. CameraError if it cannot be opened.

    /dev/video* or an integer: a video device. csi:<sensor>: a CSI camera of a Jetson. sim:<path>:
    the virtual arm. An existing file: a picture or a video.
    """
    text = f"/dev/video{source}" if str(source).isdecimal() else str(source)
    camera: Camera
    if text.startswith(("/dev/video", "/dev/v4l/")):
        camera = UsbCamera(name, text, fps=FPS)
    elif text.startswith("csi:") and text[4:].isdecimal():
        camera = CsiCamera(name, text, fps=FPS)
    elif text.startswith("sim:"):
        camera = SharedFrameCamera(name, text)
    elif Path(text).is_file():
        camera = (
            ImageFileCamera(name, text)
            if cv2.haveImageReader(text)
            else VideoFileCamera(name, text)
        )
    else:
        raise CameraError(
            f"camera {name}: cannot tell what {text!r} is. Expected /dev/video* or /dev/v4l/..., a "
            "device number, csi:<sensor>, an existing picture or video file, or sim:<path> of a "
            "virtual arm."
        )
    camera.open()
    return camera
