"""The style sheet of the HTML report: screens from phones on, print, no resources."""

STYLE = """
:root{color-scheme:light;--ink:#1a1a1a;--soft:#555;--line:#d5d5d5;--accent:#0b5a91}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1180px;padding:1rem 1.25rem 3rem;color:var(--ink);background:#fff;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.3rem;margin:2.5rem 0 .5rem;padding-top:.75rem;border-top:2px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .4rem}
h4{font-size:.95rem;margin:1rem 0 .25rem;color:var(--soft)}
p,ul{margin:.4rem 0;max-width:75ch}
a{color:var(--accent)}
.subtitle{color:var(--soft)}
.skip{position:absolute;left:-999rem}.skip:focus{position:static}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;max-width:none}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;list-style:none;padding:0;font-size:.9rem}
.swatch{width:40px;height:14px;vertical-align:middle}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:.75rem}
.grid.small{grid-template-columns:repeat(auto-fit,minmax(min(210px,100%),1fr))}
.grid>*{min-width:0}
.plot{display:block;width:100%;height:auto;font-size:11px;fill:var(--ink)}
.plot .title{font-size:12px;font-weight:600}
.plot .axis{stroke:#666}.plot .grid{stroke:#e3e3e3}
.plot .reference{stroke:#000;stroke-dasharray:5 3;stroke-width:1.2}
.plot .now{stroke:#666;stroke-dasharray:2 2}
.scroll{overflow-x:auto;margin:.75rem 0;max-width:100%}
.tables{columns:27rem;column-gap:2rem}
.tables .scroll{break-inside:avoid;margin-top:0;padding-top:.5rem}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:.3rem;color:var(--soft)}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top;white-space:nowrap}
th{font-weight:600;text-align:left}
thead th{text-align:right;border-bottom:2px solid #888}
thead th:first-child,thead th.text{text-align:left}
th[scope=row]{font-weight:400}
td.name{text-align:left}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
.star{color:#8a4b00;margin-left:.2rem}
.heat td,.heat th{padding:.12rem .4rem;font-size:.8rem}
.heat caption{white-space:nowrap}.heat td{min-width:2rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;padding:.75rem;border:1px solid
var(--line);font-size:.85rem}
@media (max-width:600px){body{padding:.75rem .75rem 2rem;font-size:15px}h1{font-size:1.4rem}
table{font-size:.8rem}th,td{padding:.2rem .35rem}
th[scope=rowgroup]{white-space:normal;overflow-wrap:anywhere;min-width:4rem;max-width:4.5rem}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav,.skip{display:none}
a{color:inherit;text-decoration:none}h2{break-after:avoid}h3,h4{break-after:avoid}
.scroll{overflow:visible}.tables{columns:1}tr,.plot{break-inside:avoid}
.grid{grid-template-columns:repeat(3,1fr)}.grid.small{grid-template-columns:repeat(4,1fr)}
table{font-size:8pt}.heat td,.heat th{font-size:6.5pt;padding:.05rem .2rem}
th,td{padding:.1rem .3rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
""".replace("\n", "")
