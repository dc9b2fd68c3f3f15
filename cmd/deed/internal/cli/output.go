package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/mattn/go-isatty"
	"github.com/schollz/progressbar/v3"
)

// column is one of a table.
type column struct {
	title  string
	number bool // aligned to the right
}

// textTable is cells in aligned columns.
type textTable struct {
	columns []column
	rows    [][]string
}

// newTable returns an empty table; if no column has a title it has no header.
func newTable(columns ...column) *textTable {
	t := &textTable{columns: columns}
	var titles []string
	named := false
	for _, c := range columns {
		titles = append(titles, c.title)
		named = named || c.title != ""
	}
	if named {
		t.rows = append(t.rows, titles)
	}
	return t
}

// add adds a row, which has a cell for each column.
func (t *textTable) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *textTable) print(out io.Writer) error {
	widths := make([]int, len(t.columns))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			padding := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if t.columns[i].number {
				line.WriteString(padding + cell + "  ")
			} else {
				line.WriteString(cell + padding + "  ")
			}
		}
		if _, err := fmt.Fprintln(out, strings.TrimRight(line.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// printJSON writes the value as one indented document.
func printJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// count writes a number with a comma before every three digits.
func count[N ~int | ~int64 | ~uint64](n N) string {
	digits := strconv.FormatInt(int64(n), 10)
	sign := ""
	if rest, negative := strings.CutPrefix(digits, "-"); negative {
		sign, digits = "-", rest
	}
	for at := len(digits) - 3; at > 0; at -= 3 {
		digits = digits[:at] + "," + digits[at:]
	}
	return sign + digits
}

// rate writes a number a second.
func rate(perSecond float64) string {
	if perSecond >= 100 || perSecond == 0 {
		return count(int64(perSecond + 0.5))
	}
	return strconv.FormatFloat(perSecond, 'g', 3, 64)
}

// moment writes a time for people.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && isatty.IsTerminal(file.Fd())
}

// progress shows on a terminal how far something has come. The nil progress
// shows nothing.
type progress struct {
	out   io.Writer
	phase string
	drawn time.Time
	bar   *progressbar.ProgressBar
}

// drawEvery is the least time between two pictures of a bar.
const drawEvery = 100 * time.Millisecond

// newProgress returns nil unless out is a terminal.
func newProgress(out io.Writer) *progress {
	if !isTerminal(out) {
		return nil
	}
	return &progress{out: out}
}

// show replaces what is shown. A new phase begins a new bar.
func (p *progress) show(phase, remark string, done, total int64) {
	if p == nil || total <= 0 {
		return
	}
	fresh := p.bar == nil || phase != p.phase
	if !fresh && time.Since(p.drawn) < drawEvery {
		return
	}
	p.drawn = time.Now()
	if fresh {
		p.clear()
		p.phase = phase
		p.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(p.out), progressbar.OptionSetWidth(30), progressbar.OptionSetPredictTime(false),
			progressbar.OptionSetElapsedTime(false), progressbar.OptionClearOnFinish())
	}
	p.bar.Describe(strings.TrimSpace(phase + " " + remark))
	_ = p.bar.Set64(min(done, total-1)) // the whole would end the bar
}

// clear removes what is shown.
func (p *progress) clear() {
	if p != nil && p.bar != nil {
		_ = p.bar.Clear()
		p.bar = nil
	}
}
