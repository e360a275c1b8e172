"""Reading of video and audio, and measurements of them: faces, optical flow, acoustic features."""
