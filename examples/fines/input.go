package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

//go:embed sample/fines-1k.csv.gz
var sample embed.FS

const sampleName = "sample/fines-1k.csv.gz"

// Row is one line of the log.
type Row struct {
	Number   int // 1 for the first row after the header
	Fine     string
	Date     time.Time // midnight, UTC
	Activity string
	Amount   Cents // of Create Fine and Add penalty
	Payment  Cents
	Expense  Cents
}

// openInput opens a log by name; empty means the sample that comes with the
// program. A file packed by gzip is recognised by its content.
func openInput(name string) (io.ReadCloser, error) {
	var file io.ReadCloser
	var err error
	if name == "" {
		file, err = sample.Open(sampleName)
	} else {
		file, err = os.Open(name)
	}
	if err != nil {
		return nil, fmt.Errorf("open input: %w", err)
	}
	buffered := bufio.NewReaderSize(file, 1<<16)
	magic, err := buffered.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(fmt.Errorf("read input %q: %w", name, err), file.Close())
	}
	if !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return input{buffered, file}, nil
	}
	unpacked, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("unpack input %q: %w", name, err), file.Close())
	}
	return input{unpacked, file}, nil
}

type input struct {
	io.Reader
	io.Closer
}

// inputTitle is how a log is known in its database: the same log, packed or
// not and wherever it lies, may be continued.
func inputTitle(name string) string {
	if name == "" {
		name = sampleName
	}
	return strings.TrimSuffix(filepath.Base(name), ".gz")
}

// Rows reads the log one line at a time.
func Rows(r io.Reader) iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		reader := csv.NewReader(r)
		reader.ReuseRecord = true
		header, err := reader.Read()
		if err != nil {
			yield(Row{}, fmt.Errorf("read header: %w", err))
			return
		}
		columns := map[string]int{}
		for _, name := range []string{"fine", "time", "activity", "amount", "paymentAmount", "expense"} {
			columns[name] = slices.Index(header, name)
			if columns[name] < 0 {
				yield(Row{}, fmt.Errorf("the header has no column %q: %q", name, header))
				return
			}
		}
		fine, date, activity := columns["fine"], columns["time"], columns["activity"]
		amount, payment, expense := columns["amount"], columns["paymentAmount"], columns["expense"]
		var last Row
		for number := 1; ; number++ {
			record, err := reader.Read()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield(Row{}, fmt.Errorf("row %d: %w", number, err))
				return
			}
			// Cloned, because ids live long and would keep their whole lines in memory.
			row := Row{Number: number, Fine: strings.Clone(record[fine]), Activity: record[activity]}
			if row.Fine == "" {
				yield(Row{}, fmt.Errorf("row %d names no fine", number))
				return
			}
			if row.Date, err = time.Parse(time.DateOnly, record[date]); err != nil {
				yield(Row{}, fmt.Errorf("row %d: %w", number, err))
				return
			}
			if row.Date.Before(last.Date) {
				yield(Row{}, fmt.Errorf("row %d is of %s, after a row of %s: sort the log by date", number, record[date], last.Date.Format(time.DateOnly)))
				return
			}
			var mistakes [3]error
			row.Amount, mistakes[0] = ParseCents(record[amount])
			row.Payment, mistakes[1] = ParseCents(record[payment])
			row.Expense, mistakes[2] = ParseCents(record[expense])
			if err := errors.Join(mistakes[:]...); err != nil {
				yield(Row{}, fmt.Errorf("row %d: %w", number, err))
				return
			}
			if !yield(row, nil) {
				return
			}
			last = row
		}
	}
}

// Dates groups rows by their date, so that a date is held in memory, never the
// log.
func Dates(rows iter.Seq2[Row, error]) iter.Seq2[[]Row, error] {
	return func(yield func([]Row, error) bool) {
		var date []Row
		for row, err := range rows {
			if err != nil {
				yield(nil, err)
				return
			}
			if len(date) > 0 && !row.Date.Equal(date[0].Date) {
				if !yield(date, nil) {
					return
				}
				date = nil
			}
			date = append(date, row)
		}
		if len(date) > 0 {
			yield(date, nil)
		}
	}
}
