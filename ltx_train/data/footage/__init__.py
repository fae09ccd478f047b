"""Long recordings to clips: scenes, speech, subtitles, and where to cut."""
