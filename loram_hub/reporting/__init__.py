"""One HTML page about releases, trainings and adapters: what was kept, what was lost, what was won, where it went.

sources       what a name stands for
facts         what was read, as frozen records; gathering, releases, adapters, trainings read it
contents      what is shown: sections of paragraphs, tables, figures
summary, release_sections, tuning_sections, study_sections   facts to contents, in words and numbers
drawings      the pictures; those of cards and estimates are taken from there
page          contents and pictures to HTML (report.html.j2, report.css)
reporting     `report`, which puts all this together
"""

from loram_hub.reporting.reporting import Report as Report
from loram_hub.reporting.reporting import report as report
