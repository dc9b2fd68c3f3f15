package main

import (
	"fmt"
	"math"
	"strings"
)

// Cents is an amount of money, exact to the cent.
type Cents int64

// String formats the amount as euros, for example 1,234.50.
func (c Cents) String() string {
	sign := ""
	if c < 0 {
		sign, c = "-", -c
	}
	return fmt.Sprintf("%s%s.%02d", sign, thousands(int64(c/100)), c%100)
}

// ParseCents reads euros such as 62.59, 31.3 or 20 without ever going through
// a float: 0.1 + 0.2 must be 0.3. What lies beyond the cent is rounded, halves
// up. Blank is zero.
func ParseCents(text string) (Cents, error) {
	digits, negative := strings.CutPrefix(strings.TrimSpace(text), "-")
	if digits == "" && !negative {
		return 0, nil
	}
	whole, fraction, _ := strings.Cut(digits, ".")
	if whole+fraction == "" || strings.Trim(whole+fraction, "0123456789") != "" {
		return 0, fmt.Errorf("amount %q is not a number of euros such as 62.59", text)
	}
	var cents int64
	for _, digit := range whole + (fraction + "00")[:2] {
		if cents > (math.MaxInt64-9)/10 {
			return 0, fmt.Errorf("amount %q is too large", text)
		}
		cents = cents*10 + int64(digit-'0')
	}
	if len(fraction) > 2 {
		rest := strings.TrimRight(fraction[2:], "0")
		// A negative half rounds up to the smaller magnitude.
		if rest > "5" || rest == "5" && !negative {
			cents++
		}
	}
	if negative {
		cents = -cents
	}
	return Cents(cents), nil
}

// thousands groups digits: 561470 becomes 561,470.
func thousands(n int64) string {
	if n < 0 {
		return "-" + thousands(-n)
	}
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
