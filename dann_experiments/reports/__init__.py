"""Pages, figures and pictures, made from plain numbers: nothing here knows a tracking store or the settings of a job."""
