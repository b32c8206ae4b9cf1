"""Pages, figures and pictures from plain numbers, independent of the tracking store and the settings of a job."""
