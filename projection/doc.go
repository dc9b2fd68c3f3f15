// Package projection folds events into read models.
package projection
