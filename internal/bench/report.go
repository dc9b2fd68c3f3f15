package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A report is everything that was measured, and what follows from it.
type report struct {
	Conditions conditions `json:"conditions"`
	Rows       []verdict  `json:"rows"`
	Runs       []sample   `json:"runs"`

	rows []row
}

// A verdict is a row with its figures.
type verdict struct {
	ID         string  `json:"id"`
	Title      string  `json:"title"`
	Deed       string  `json:"deed"`
	DeedValue  float64 `json:"deed_value"` // per second, or ms where the bars are times
	Base       string  `json:"baseline,omitempty"`
	BaseValue  float64 `json:"baseline_value,omitempty"`
	Ratio      float64 `json:"ratio,omitempty"` // of the medians
	Lowest     float64 `json:"lowest"`          // ratio of one turn, or value
	Highest    float64 `json:"highest"`
	Floor      float64 `json:"floor,omitempty"`
	Goal       float64 `json:"goal,omitempty"`
	Verdict    string  `json:"verdict"` // goal, floor, below, or empty without bars
	Guarantees string  `json:"guarantees,omitempty"`
	Problem    string  `json:"problem,omitempty"` // why there is no figure
}

func (rep *report) of(s *spec) []sample {
	var found []sample
	for _, run := range rep.Runs {
		if run.Spec == s.name {
			found = append(found, run)
		}
	}
	return found
}

// evaluate fills in the rows from the runs.
func (rep *report) evaluate() {
	rep.Rows = nil
	for _, r := range rep.rows {
		rep.Rows = append(rep.Rows, rep.judge(r))
	}
}

func (rep *report) judge(r row) verdict {
	v := verdict{ID: r.id, Title: r.title, Deed: r.deed.name, Floor: r.floor, Goal: r.goal}
	value := func(r *Result) float64 { return r.PerSecond }
	if r.base == nil {
		value = func(r *Result) float64 { return r.P50 }
	}
	byTurn := func(s *spec) map[int]float64 {
		found := map[int]float64{}
		for _, run := range rep.of(s) {
			if run.Result != nil {
				found[run.Turn] = value(run.Result)
			} else if v.Problem == "" {
				v.Problem = s.name + ": " + run.Error
			}
		}
		if len(found) == 0 && v.Problem == "" {
			v.Problem = s.name + ": did not run"
		}
		return found
	}
	deed := byTurn(r.deed)
	v.DeedValue = median(values(deed))
	if r.base == nil {
		v.Lowest, v.Highest = extremes(values(deed))
		if len(deed) > 0 {
			v.Verdict = judgeBars(-v.DeedValue, -r.floor, -r.goal, r.floor > 0, r.goal > 0)
		}
		return v
	}
	v.Base, v.Guarantees = r.base.name, r.base.guarantees()
	if r.note != "" {
		v.Guarantees = strings.TrimPrefix(v.Guarantees+"; "+r.note, "; ")
	}
	base := byTurn(r.base)
	v.BaseValue = median(values(base))
	var ratios []float64
	for turn, d := range deed {
		if b := base[turn]; b > 0 {
			ratios = append(ratios, d/b)
		}
	}
	if len(deed) == 0 || v.BaseValue == 0 {
		return v
	}
	v.Ratio = v.DeedValue / v.BaseValue
	v.Lowest, v.Highest = extremes(ratios)
	v.Verdict = judgeBars(v.Ratio, r.floor, r.goal, r.floor > 0, r.goal > 0)
	return v
}

func judgeBars(value, floor, goal float64, hasFloor, hasGoal bool) string {
	switch {
	case hasGoal && value >= goal:
		return "goal"
	case hasFloor && value >= floor:
		return "floor"
	case hasFloor:
		return "below"
	}
	return ""
}

func values(m map[int]float64) []float64 {
	var v []float64
	for _, x := range m {
		v = append(v, x)
	}
	return v
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

func extremes(v []float64) (lowest, highest float64) {
	if len(v) == 0 {
		return 0, 0
	}
	return slices.Min(v), slices.Max(v)
}

// bars as text.
func (r row) bars() (floor, goal string) {
	return bar(r.floor, r.base == nil), bar(r.goal, r.base == nil)
}

func bar(v float64, isTime bool) string {
	switch {
	case v == 0:
		return "-"
	case isTime:
		return duration(v)
	}
	return strconv.FormatFloat(v, 'g', -1, 64) + "x"
}

// duration writes milliseconds.
func duration(v float64) string {
	switch {
	case v < 1:
		return short(v*1000) + " us"
	case v >= 1000:
		return short(v/1000) + " s"
	}
	return short(v) + " ms"
}

// short writes a number with three digits.
func short(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a >= 999_500:
		return three(v/1e6) + "M"
	case a >= 999.5:
		return three(v/1e3) + "k"
	}
	return three(v)
}

func three(v float64) string {
	digits := 0
	for a := math.Abs(v); a < 99.95 && digits < 2; a *= 10 {
		digits++
	}
	text := strconv.FormatFloat(v, 'f', digits, 64)
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	if text == "0" && v != 0 {
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
	return text
}

// table is the text of both tables, and whether something is missing.
func (rep *report) tables() (rowTable, caseTable [][]string) {
	rowTable = [][]string{{"row", "what", "deed", "baseline", "ratio (in one turn)", "floor", "goal", "verdict", "guarantees of the baseline"}}
	for i, v := range rep.Rows {
		floor, goal := rep.rows[i].bars()
		deed, base, ratio, judged := "-", "-", "-", v.Verdict
		switch {
		case rep.rows[i].base == nil && v.Verdict != "": // 0 is a time too
			deed = duration(v.DeedValue)
			ratio = fmt.Sprintf("(%s..%s)", duration(v.Lowest), duration(v.Highest))
		case v.DeedValue > 0:
			deed = short(v.DeedValue) + "/s"
		}
		if v.BaseValue > 0 {
			base = short(v.BaseValue) + "/s"
		}
		if v.Ratio > 0 {
			ratio = fmt.Sprintf("%sx (%s..%s)", short(v.Ratio), short(v.Lowest), short(v.Highest))
		}
		if v.Problem != "" {
			judged = strings.TrimPrefix(judged+"; incomplete", "; ")
		}
		if judged == "" {
			judged = "-"
		}
		guarantees := v.Guarantees
		if guarantees == "" {
			guarantees = "-"
		}
		rowTable = append(rowTable, []string{v.ID, v.Title, deed, base, ratio, floor, goal, judged, guarantees})
	}
	caseTable = [][]string{{"what ran", "counted", "a second: median (lowest..highest)", "p50", "p95", "p99", "durability", "remarks"}}
	seen := map[string]bool{}
	for _, r := range rep.rows {
		for _, s := range r.specs() {
			if seen[s.name] {
				continue
			}
			seen[s.name] = true
			if line := rep.caseLine(s); line != nil {
				caseTable = append(caseTable, line)
			}
		}
	}
	return rowTable, caseTable
}

func (rep *report) caseLine(s *spec) []string {
	var rate, p50, p95, p99 []float64
	var last *Result
	var conflicts, failures int64
	problem := ""
	for _, run := range rep.of(s) {
		if run.Result == nil {
			continue
		}
		last = run.Result
		rate = append(rate, last.PerSecond)
		p50, p95, p99 = append(p50, last.P50), append(p95, last.P95), append(p99, last.P99)
		conflicts += last.Conflicts
		failures += last.Errors
		if len(last.Problems) > 0 {
			problem = last.Problems[0]
		}
	}
	if last == nil {
		return nil
	}
	unit, _ := last.Details["unit"].(string)
	if s.bench != "" {
		unit = cases[s.bench].unit
	}
	var remarks []string
	if last.Peer != "" {
		remarks = append(remarks, last.Peer)
	}
	if last.Notes != "" {
		remarks = append(remarks, last.Notes)
	}
	if note, ok := last.Details["note"].(string); ok {
		remarks = append(remarks, note)
	}
	if conflicts > 0 {
		remarks = append(remarks, fmt.Sprintf("%d conflicts", conflicts))
	}
	if failures > 0 {
		remarks = append(remarks, fmt.Sprintf("%d ERRORS", failures))
	}
	if problem != "" {
		remarks = append(remarks, problem)
	}
	lowest, highest := extremes(rate)
	return []string{
		s.name, unit, fmt.Sprintf("%s (%s..%s)", short(median(rate)), short(lowest), short(highest)),
		duration(median(p50)), duration(median(p95)), duration(median(p99)), last.Durability, strings.Join(remarks, "; "),
	}
}

// print writes the report for a terminal or as Markdown.
func (rep *report) print(out io.Writer, markdown bool) error {
	rowTable, caseTable := rep.tables()
	write := writeColumns
	bullet := "  "
	if markdown {
		write, bullet = writeMarkdown, "- "
	}
	for _, line := range rep.Conditions.lines() {
		fmt.Fprintln(out, bullet+line)
	}
	fmt.Fprintln(out)
	if err := write(out, rowTable); err != nil {
		return err
	}
	fmt.Fprintln(out)
	if err := write(out, caseTable); err != nil {
		return err
	}
	// One line a reason, with everything that it kept from running.
	var reasons []string
	stopped := map[string][]string{}
	for _, r := range rep.rows {
		for _, s := range r.specs() {
			for _, run := range rep.of(s) {
				if run.Error == "" {
					continue
				}
				if _, ok := stopped[run.Error]; !ok {
					reasons = append(reasons, run.Error)
				}
				if !slices.Contains(stopped[run.Error], s.name) {
					stopped[run.Error] = append(stopped[run.Error], s.name)
				}
			}
		}
	}
	if len(reasons) > 0 {
		fmt.Fprintln(out, "\nNot measured:")
		fmt.Fprintln(out)
	}
	for _, reason := range reasons {
		fmt.Fprintf(out, "%s%s: %s\n", bullet, strings.Join(stopped[reason], "; "), strings.ReplaceAll(reason, "\n", "; "))
	}
	return nil
}

func writeColumns(out io.Writer, table [][]string) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, line := range table {
		fmt.Fprintln(t, strings.Join(line, "\t"))
	}
	return t.Flush()
}

func writeMarkdown(out io.Writer, table [][]string) error {
	var text strings.Builder
	for i, line := range table {
		text.WriteString("| " + strings.Join(line, " | ") + " |\n")
		if i == 0 {
			text.WriteString(strings.Repeat("| --- ", len(line)) + "|\n")
		}
	}
	_, err := io.WriteString(out, text.String())
	return err
}
