"""`raykernel report`: one page of HTML of a store or a study, with its figures and their data.

    store → Evidence (tables, rows of a study) → Charts, Sheets → files → index.html

Numbers come from the result tables; only what no table holds, eigenvalues and alignments of single
layers, is taken from the stored blocks. A chart that the evidence cannot make is left out.

    evidence.py    what is reported: result tables, asked in SQL, and the rows of a study
    ink.py         colours, and a chart as SVG and PNG
    chart.py       what a figure is
    decomposed.py  what no table holds: eigenvalues and alignments, off the stored blocks
    kernels.py     figures of kernels: eigenvalues by layer
    heatmaps.py    κ and alignment over layers and modules
    correlations.py  κ against training
    paths.py       fine-tuning and its linear model along λ
    methods.py     fine-tuning beside kernel regression, and beside its linearisation
    costs.py       figures of choices of layers, of a sweep's history, of costs
    tables.py      the page's tables
    page.py        the page, from page.html, page.css and page.js
    write.py       the command: from a store to a folder
"""
