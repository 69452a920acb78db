"""Many pictures and videos, by one worker or several on Ray: `glip-batch`.

A run is divided into units (a picture, or some frames of a video). Workers turn units into outcomes; one process, which
holds the output folder, records outcomes in part files that are whole or not there, and writes the results from those.
"""
