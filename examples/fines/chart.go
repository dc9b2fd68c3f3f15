package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

// Point is a month of the chart.
type Point struct {
	Month       time.Time // its first day
	Issued      Cents
	Paid        Cents
	Outstanding Cents // owed at the end of the month
}

// The chart's measures, in pixels.
const (
	chartWidth  = 1200
	chartLeft   = 90
	chartRight  = 30
	panelHeight = 250
	topPanel    = 90  // upper edge of the panel of issued and paid
	lowPanel    = 420 // upper edge of the panel of what is outstanding
	chartHeight = 710
)

const (
	issuedColour      = "#4878a8"
	paidColour        = "#6aa84f"
	outstandingColour = "#c0504d"
)

// WriteChart draws issued and paid by month above what was outstanding, as
// SVG. The two panels share the months, not the scale: a balance is many times
// a month's turnover.
func WriteChart(w io.Writer, title string, points []Point) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13" fill="#333">`+"\n", chartWidth, chartHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", chartWidth, chartHeight)
	fmt.Fprintf(&b, `<text x="%d" y="32" font-size="20" font-weight="bold">%s</text>`+"\n", chartLeft, escape(title))

	var turnover, balance Cents
	for _, p := range points {
		turnover = max(turnover, p.Issued, p.Paid)
		balance = max(balance, p.Outstanding)
	}
	step := float64(chartWidth-chartLeft-chartRight) / float64(max(len(points), 1))
	x := func(i int) float64 { return chartLeft + float64(i)*step }

	scale := drawPanel(&b, topPanel, turnover, points, x)
	legend(&b, topPanel, []string{"issued in the month", "paid in the month"}, []string{issuedColour, paidColour})
	bar := step * 0.42
	for i, p := range points {
		for n, column := range []struct {
			value  Cents
			colour string
		}{{p.Issued, issuedColour}, {p.Paid, paidColour}} {
			if column.value > 0 {
				height := scale(column.value)
				fmt.Fprintf(&b, `<rect x="%.2f" y="%.2f" width="%.2f" height="%.2f" fill="%s"><title>%s: %s</title></rect>`+"\n",
					x(i)+step*0.08+float64(n)*bar, topPanel+panelHeight-height, bar, height, column.colour, p.Month.Format("2006-01"), column.value)
			}
		}
	}

	scale = drawPanel(&b, lowPanel, balance, points, x)
	legend(&b, lowPanel, []string{"outstanding at the month's end"}, []string{outstandingColour})
	if len(points) > 0 {
		var line strings.Builder
		for i, p := range points {
			fmt.Fprintf(&line, "%.2f,%.2f ", x(i)+step/2, lowPanel+panelHeight-scale(p.Outstanding))
		}
		first, last := x(0)+step/2, x(len(points)-1)+step/2
		fmt.Fprintf(&b, `<polygon points="%.2f,%d %s%.2f,%d" fill="%s" fill-opacity="0.15"/>`+"\n", first, lowPanel+panelHeight, line.String(), last, lowPanel+panelHeight, outstandingColour)
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2" stroke-linejoin="round"/>`+"\n", strings.TrimSpace(line.String()), outstandingColour)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// drawPanel draws axes, grid and labels, and returns how high a value stands
// in the panel.
func drawPanel(b *strings.Builder, top int, largest Cents, points []Point, x func(int) float64) func(Cents) float64 {
	tick, ticks := niceTicks(largest)
	scale := func(c Cents) float64 { return panelHeight * float64(c) / float64(tick*Cents(ticks)) }
	bottom := float64(top + panelHeight)
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end" fill="#777">euros</text>`+"\n", chartLeft-10, top-18)
	for n := range ticks + 1 {
		value := tick * Cents(n)
		y := bottom - scale(value)
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/>`+"\n", chartLeft, chartWidth-chartRight, y, y)
		fmt.Fprintf(b, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", chartLeft-10, y+4.5, thousands(int64(value/100)))
	}
	// Label years; on a log of few months, every month.
	for i, p := range points {
		label := p.Month.Format("2006")
		if len(points) <= 24 {
			label = p.Month.Format("2006-01")
			if len(points) > 12 && i%2 == 1 {
				continue
			}
		} else if p.Month.Month() != time.January {
			continue
		}
		fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#777"/>`+"\n", x(i), x(i), bottom, bottom+6)
		fmt.Fprintf(b, `<text x="%.1f" y="%.1f">%s</text>`+"\n", x(i)+3, bottom+20, label)
	}
	fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#777"/>`+"\n", chartLeft, chartWidth-chartRight, bottom, bottom)
	return scale
}

func legend(b *strings.Builder, top int, names, colours []string) {
	x := float64(chartLeft)
	for i, name := range names {
		fmt.Fprintf(b, `<rect x="%.0f" y="%d" width="13" height="13" fill="%s"/><text x="%.0f" y="%d">%s</text>`+"\n", x, top-29, colours[i], x+20, top-18, escape(name))
		x += 20 + 8*float64(len(name)) + 24
	}
}

// niceTicks divides an axis that must reach the largest value into at most six
// steps of 1, 2 or 5 times a power of ten euros.
func niceTicks(largest Cents) (Cents, int) {
	euros := math.Max(float64(largest)/100, 1)
	power := math.Pow(10, math.Floor(math.Log10(euros)))
	for _, factor := range []float64{0.2, 0.5, 1, 2} {
		tick := power * factor
		if n := math.Ceil(euros / tick); n <= 6 {
			return Cents(tick * 100), int(n)
		}
	}
	return Cents(power * 500), 2
}

func escape(text string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(text)
}
