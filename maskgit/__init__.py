"""The method: data, holes, hiding, decoding, and the Inpainter that puts them together."""
